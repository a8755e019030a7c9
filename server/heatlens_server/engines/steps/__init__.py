"""Methods that take many runs of the network per image: generators that run it on some rows, then let others."""
