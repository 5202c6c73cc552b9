"""K-FAC and EK-FAC: covariances, their eigenbases, eigenvalues in that basis, and the damped inverse."""
