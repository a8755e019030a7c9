"""What requests ask of models of each task."""
