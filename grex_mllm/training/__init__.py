"""The training room: losses, matching, optimisers, the one loop."""
