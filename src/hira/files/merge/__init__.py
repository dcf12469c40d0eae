"""`hira merge`: a plan of the merged model's tensors, and the writing of them."""
