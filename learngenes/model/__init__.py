"""The network: factors, Sigma, the DiT around them, the noise process, sampling."""
