//! FUSE: the session, and the faces of a layer.
