"""What a training needs before it is started: parameters, memory of each GPU, work and time; counted on shapes, without weights."""
