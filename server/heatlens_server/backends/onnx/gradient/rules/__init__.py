"""One rule per operator: from the gradients of its outputs to those of its inputs."""
