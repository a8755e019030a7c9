"""heatlens: ask a server why an image model said what it said."""
