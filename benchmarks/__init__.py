"""Speed and scale beside peers: `make bench`."""
