//! Compiles `proto/` with a protobuf compiler that is itself a Rust library, so that a build needs no protoc.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut files: Vec<_> = std::fs::read_dir("proto")?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "proto"));
    files.sort();
    let descriptors = protox::compile(&files, ["proto"])?;
    // Lazuli serves the snapshots service, and for the others is a client; its tests serve them too.
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
