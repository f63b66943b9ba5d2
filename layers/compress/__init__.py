"""The shared parts that compression methods are composed of."""
