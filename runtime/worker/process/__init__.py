"""A worker's device in a process of its own: the step loop stays here, its plans go over a socket."""
