"""Films for `heatlens video`: where frames come from, how they are answered and drawn, and where they go."""
