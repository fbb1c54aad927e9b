"""Predictions in the forms of other tools, and people's corrections back: COCO results, Label Studio, supervision, FiftyOne."""
