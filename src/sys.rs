//! The operating system: mounts, descriptors, id-mapping. The only room where `unsafe` may stand; it has no policy.
