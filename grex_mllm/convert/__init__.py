"""Conversion of published checkpoints into our model folders, with every key accounted for."""
