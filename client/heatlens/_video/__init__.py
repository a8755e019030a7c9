"""Films for `heatlens video`: where frames come from, how they are answered, how they look and where they go."""
