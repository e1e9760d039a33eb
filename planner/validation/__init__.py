"""Published runs through the simulator: what was measured against what is predicted."""
