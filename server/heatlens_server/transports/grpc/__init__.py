"""gRPC and protobuf at the edge."""
