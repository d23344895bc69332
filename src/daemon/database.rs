//! The metadata database as the daemon opens it: never anew over what an earlier one knew of; and what is asked of it before anybody else has it.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::{DaemonError, io_error};
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::store::{self, Store, StoreError};

/// The metadata database, in the root directory.
pub(super) const DATABASE: &str = "metadata.redb";

/// Opens the database in the root directory, or makes one where there is nothing yet that it should know.
pub(super) fn open_store(root: &Path, metrics: &Arc<Metrics>) -> Result<Store, DaemonError> {
    let (path, directory) = (root.join(DATABASE), root.join("snapshots"));
    let looking = |at: &Path| io_error(format!("looking at {}", at.display()));
    if store::is_blank(&path).map_err(looking(&path))? {
        let is_snapshot = |name: &str| name.parse::<u64>().is_ok();
        let snapshots = match std::fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            listed => listed
                .and_then(|listed| listed.collect::<io::Result<Vec<_>>>())
                .map_err(looking(&directory))?
                .iter()
                .filter(|entry| entry.file_name().to_str().is_some_and(is_snapshot))
                .count(),
        };
        if snapshots > 0 {
            return Err(DaemonError::DatabaseLost {
                path,
                directory,
                snapshots,
            });
        }
    }
    Ok(Store::open_counted(&path, Arc::clone(metrics))?)
}

/// Layers that snapshots refer to. A snapshot whose record is damaged refers to none that is known; it is reported.
pub(super) fn referenced_layers(store: &Store) -> Result<Vec<Digest>, StoreError> {
    let mut layers = Vec::new();
    for (name, record) in store.snapshots()? {
        match record {
            Ok(record) => {
                layers.extend(record.layer);
                layers.extend(record.chain.into_iter().flatten());
            }
            Err(error) => tracing::error!(%error, snapshot = name, "its record is damaged"),
        }
    }
    Ok(layers)
}

/// By what layers are known, and what they were known by in older caches.
pub(super) fn names_of_layers(store: &Store) -> Result<HashMap<Digest, Digest>, StoreError> {
    let layers = store.layers()?.into_iter();
    let records = layers
        .filter_map(|(_, record)| record.ok())
        .filter(|record| record.variant_of.is_none());
    Ok(records
        .map(|record| (record.formerly.unwrap_or(record.digest), record.digest))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A database that begins anew where snapshots are would have them cleaned up.
    #[test]
    fn a_lost_database_is_not_begun_anew_over_snapshots() {
        let dir = tempfile::tempdir().unwrap();
        let (root, metrics) = (dir.path(), Arc::new(Metrics::new()));
        let database = root.join(DATABASE);
        drop(open_store(root, &metrics).unwrap());
        let good = std::fs::read(&database).unwrap();
        std::fs::create_dir_all(root.join("snapshots/7/fs")).unwrap();
        drop(open_store(root, &metrics).unwrap());
        let lose: [fn(&Path); 3] = [
            |path| std::fs::remove_file(path).unwrap(),
            |path| std::fs::write(path, "").unwrap(),
            |path| std::fs::write(path, [0; 8192]).unwrap(),
        ];
        for lose in lose {
            lose(&database);
            let before = std::fs::read(&database).ok();
            let error = open_store(root, &metrics).unwrap_err();
            assert!(
                matches!(error, DaemonError::DatabaseLost { snapshots: 1, .. }),
                "{error}"
            );
            assert_eq!(std::fs::read(&database).ok(), before, "it is left as it was found");
        }
        // What is no database is no empty one either.
        std::fs::write(&database, "something else").unwrap();
        assert!(matches!(
            open_store(root, &metrics),
            Err(DaemonError::Store(StoreError::Open { .. }))
        ));
        std::fs::write(&database, good).unwrap();
        drop(open_store(root, &metrics).unwrap());
        // Nothing to lose.
        std::fs::remove_dir_all(root.join("snapshots")).unwrap();
        std::fs::write(&database, [0; 8192]).unwrap();
        drop(open_store(root, &metrics).unwrap());
    }
}
