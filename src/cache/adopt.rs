//! By what layers are known on disk, and what becomes of a cache in which they were known otherwise.
//!
//! A layer's directory is named for its [`Key::id`]. Versions before that named it for the blob, whoever had said what its index is. The
//! file [`MARKER`] says that a cache is of the present form. Without it, whoever knows where the indexes came from says what is to be done
//! with each directory ([`adopt`]); what is still there without the file when the cache is opened is removed: nobody could say whether it
//! may be believed. Renames are made one by one and lead to the same end if they are cut off and begun again.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use super::CacheError;
use super::staging::sync_dir;
use crate::layer::Digest;

/// The file that says that directories are named for ids.
const MARKER: &str = ".ids";

/// What tells a layer in the cache from all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// What is believed of the layer. It is the digest of the blob if the index was built from the blob itself, and any other digest, of
    /// the blob and of what was believed of it, if not.
    pub id: Digest,
    /// Digest of the blob.
    pub blob: Digest,
}

impl From<&Digest> for Key {
    /// A layer whose index is built from its blob.
    fn from(blob: &Digest) -> Self {
        Key { id: *blob, blob: *blob }
    }
}

/// Gives the directories of an older cache under `root` the names that `names` has for theirs; the others are removed. A cache of the present
/// form is left as it is. To be called before the cache is opened, by who keeps others from it.
///
/// # Errors
/// [`CacheError::Io`].
pub fn adopt(root: &Path, names: &HashMap<Digest, Digest>) -> Result<(), CacheError> {
    let layers = root.join("layers");
    if layers.join(MARKER).exists() || !layers.exists() {
        return Ok(());
    }
    // What was renamed before it was cut off.
    let renamed: Vec<&Digest> = names.values().collect();
    let (mut kept, mut removed) = (0_usize, 0_usize);
    for (digest, name) in directories(&layers)? {
        let path = layers.join(&name);
        match names.get(&digest) {
            Some(id) if *id == digest => kept += 1,
            Some(id) => {
                let target = layers.join(id.hex());
                fs::rename(&path, &target).map_err(CacheError::io("rename", &path))?;
                kept += 1;
            }
            None if renamed.contains(&&digest) => kept += 1,
            None => {
                fs::remove_dir_all(&path).map_err(CacheError::io("delete", &path))?;
                removed += 1;
            }
        }
    }
    tracing::info!(kept, removed, "took over the cache of an older version");
    mark(&layers)
}

/// Whether the cache under `root` is of the present form.
pub(super) fn is_keyed(layers: &Path) -> bool {
    layers.join(MARKER).exists()
}

/// Makes a cache one of the present form, without what is in it if it is of none.
pub(super) fn keyed(layers: &Path) -> Result<(), CacheError> {
    if is_keyed(layers) {
        return Ok(());
    }
    for (_, name) in directories(layers)? {
        let path = layers.join(name);
        tracing::warn!(
            "{} is of an older version, nobody knows what was believed of it: it is removed",
            path.display()
        );
        fs::remove_dir_all(&path).map_err(CacheError::io("delete", &path))?;
    }
    mark(layers)
}

fn mark(layers: &Path) -> Result<(), CacheError> {
    sync_dir(layers)?;
    let path = layers.join(MARKER);
    let write = || {
        let mut file = File::create(&path)?;
        file.write_all(b"1\n")?;
        file.sync_all()
    };
    write().map_err(CacheError::io("write", &path))?;
    sync_dir(layers)
}

fn directories(layers: &Path) -> Result<Vec<(Digest, String)>, CacheError> {
    let list = || -> io::Result<Vec<(Digest, String)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(layers)? {
            let name = entry?.file_name();
            if let Some(name) = name.to_str()
                && let Some(digest) = Digest::from_hex(name)
            {
                found.push((digest, name.to_owned()));
            }
        }
        Ok(found)
    };
    list().map_err(CacheError::io("list", layers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_get_the_names_of_what_was_believed() {
        let root = tempfile::tempdir().unwrap();
        let layers = root.path().join("layers");
        let [built, shared, lost, id] = ["built", "shared", "lost", "id"].map(|text| Digest::of(text.as_bytes()));
        let make = |digest: &Digest| fs::create_dir_all(layers.join(digest.hex())).unwrap();
        let names = HashMap::from([(built, built), (shared, id)]);
        for digest in [&built, &shared, &lost] {
            make(digest);
        }
        // Cut off after the rename.
        fs::rename(layers.join(shared.hex()), layers.join(id.hex())).unwrap();
        adopt(root.path(), &names).unwrap();
        let there = |digest: &Digest| layers.join(digest.hex()).exists();
        assert!(there(&built) && there(&id) && !there(&shared) && !there(&lost));
        assert!(is_keyed(&layers));

        // From then on nothing is renamed: the blob's own directory is what was built from it.
        make(&shared);
        adopt(root.path(), &names).unwrap();
        keyed(&layers).unwrap();
        assert!(there(&shared) && there(&id));

        // One that nobody has taken over.
        fs::remove_file(layers.join(MARKER)).unwrap();
        keyed(&layers).unwrap();
        assert!(!there(&shared) && is_keyed(&layers));
    }
}
