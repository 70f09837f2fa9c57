"""The mathematics, on tensors: slicing, routing, balancing, expert computation. No I/O, no modules."""
