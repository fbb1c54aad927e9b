"""Records, samples and batches."""
