//! The metadata database (redb): snapshots, layers, images.
