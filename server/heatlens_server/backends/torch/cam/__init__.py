"""What follows and what precedes the methods, for tensors: upsampling and layers, masks, scores of classes, grids."""
