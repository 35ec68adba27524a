"""Networks, their averaged weights, and how both are saved."""
