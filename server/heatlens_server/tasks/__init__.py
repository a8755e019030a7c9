"""What models do: for each task, what is asked for, what is differentiated and what is answered."""
