"""What `qtrain export` does around `qtrain.export`: runs, bases on the hub, held-out rows, manifests."""
