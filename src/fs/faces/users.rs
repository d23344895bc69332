//! Whether this machine can show layers with other owners, for containers in a user namespace: tried, once, in every way that it takes.
//!
//! It takes a user namespace that this process may make, a file system below the root directory that can be mapped, an overlayfs that takes mapped
//! directories (Linux 5.19), and, where the tree face serves, a FUSE that can be mapped (Linux 6.12). EROFS from files can wherever it is there.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::mounts::Mounts;
use super::places::{PROBE, make_mount_point};
use crate::fs::FsError;
use crate::sys::idmap::{IdRange, UserNamespace, id_mapped};
use crate::sys::mount::{Unmount, overlay, unmount};

/// A mapping as containers have it.
const MAPPING: IdRange = IdRange {
    inside: 0,
    outside: 100_000,
    count: 65_536,
};

/// Why owners cannot be mapped, if they cannot; `tree` is the FUSE mount, where it shows directories of layers.
pub(super) fn probe(mounts: &Mounts, tree: Option<&Path>) -> Result<(), String> {
    let users = UserNamespace::new(&[MAPPING], &[MAPPING])
        .map_err(|error| format!("user namespaces cannot be made: {error}"))?;
    let path = |name: &str| mounts.places.dir().join(format!("{PROBE}{name}"));
    let [lower, mapped, other, target] = ["lower", "mapped", "other", "users"].map(path);
    let made = [&lower, &mapped, &other, &target].map(|path| make_mount_point(path));
    let tried = made
        .into_iter()
        .collect::<Result<Vec<()>, FsError>>()
        .map_err(|error| error.to_string())
        .and_then(|_| {
            let attached = id_mapped(&lower, &users).and_then(|mount| mount.attach(&mapped));
            attached.map_err(|error| format!("the file system of the root directory cannot be mapped: {error}"))
        })
        .and_then(|()| {
            overlay(&[mapped.clone(), other.clone()], &target)
                .map_err(|error| format!("overlayfs takes no mapped directories before Linux 5.19: {error}"))
        })
        .and_then(|()| match fs::metadata(&target).map(|root| root.uid()) {
            Ok(owner) if owner == MAPPING.outside => Ok(()),
            seen => Err(format!(
                "overlayfs shows a mapped directory with another owner: {seen:?}"
            )),
        });
    for path in [&target, &mapped] {
        // Where nothing was mounted there is nothing to take away.
        let _ = unmount(path, Unmount::Detach);
    }
    for path in [&target, &mapped, &other, &lower] {
        let _ = fs::remove_dir(path);
    }
    tried?;
    let Some(tree) = tree.map(Path::to_owned) else {
        return Ok(());
    };
    let cannot = "FUSE cannot be mapped (that takes Linux 6.12)";
    // Its server is this process; the call has a deadline all the same.
    let mapped = mounts.calls.run(move || id_mapped(&tree, &users).map(drop));
    mapped.map_err(|error| format!("{cannot}: {error}"))
}
