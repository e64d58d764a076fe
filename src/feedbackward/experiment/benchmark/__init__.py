"""What rules cost: counted on a network, or measured beside backprop."""
