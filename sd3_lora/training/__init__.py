"""What training reads, draws, updates and writes."""
