"""What this process may take of the machine: memory, cores and threads, folders."""
