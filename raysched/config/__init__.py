"""What a run and a sweep are, and how files and command lines become one."""
