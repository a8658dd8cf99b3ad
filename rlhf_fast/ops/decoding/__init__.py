"""What sampling on a CPU is made of."""
