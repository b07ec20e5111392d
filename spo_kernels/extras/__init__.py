"""What preference training needs beside the loss: token weights, policy gradients, selection, diagnostics."""
