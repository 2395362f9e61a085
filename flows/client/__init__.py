"""What works from a laptop: it knows the API's address and a token, and talks HTTP only."""
