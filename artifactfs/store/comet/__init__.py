"""The store on a Comet server."""
