"""What every room stands on: flags, records that cross stages, model and tensor files, devices, processes."""
