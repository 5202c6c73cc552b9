"""Where it runs: object storage, the cluster, settings from the environment."""
