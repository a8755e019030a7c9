"""What is explained about the output of a network of each task."""
