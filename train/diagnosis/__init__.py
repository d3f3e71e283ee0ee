"""What train/doctor.py finds; no check imports torch before it has a process of its own."""
