"""A real pretrained model, real questions, a learning rate that decays: what each way of training is worth."""
