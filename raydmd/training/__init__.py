"""The Ray Train worker: roles, cycle, loop, checkpoints; and the driver that starts them."""
