"""Pure tensor maths of class activation maps. Imports nothing of heatlens outside this folder, and no gRPC."""
