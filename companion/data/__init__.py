"""From files, data sets and texts to tasks: batches that train and measure."""
