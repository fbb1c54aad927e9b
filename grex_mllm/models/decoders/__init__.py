"""Decoders: regions and language to masks, boxes, counts."""
