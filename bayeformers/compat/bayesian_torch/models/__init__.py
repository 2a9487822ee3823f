"""`dnn_to_bnn`: the conversion of a deterministic model, and the KL of a converted one."""
