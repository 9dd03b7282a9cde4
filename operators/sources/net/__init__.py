"""What every source that listens shares: taking requests in, keys, TLS, addresses, and connections."""
