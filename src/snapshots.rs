//! containerd's face: the snapshots gRPC service.
