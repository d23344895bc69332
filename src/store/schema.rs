//! The schema's version, and the way from an older one to this one.

use std::path::Path;

use redb::{Database, ReadableTable as _, TableDefinition, WriteTransaction};

use super::draft::{Draft, table};
use super::{StoreError, chains, ids, images, indexes, layers, snapshots, traces};

/// Version of the tables and records that this program writes.
pub const SCHEMA: u64 = MIGRATIONS.len() as u64 + FIRST_SCHEMA;

/// The version that has no step leading to it.
const FIRST_SCHEMA: u64 = 1;

/// One step of a migration, run in the same transaction as all others.
type Step = fn(&WriteTransaction) -> Result<(), StoreError>;

/// `MIGRATIONS[i]` turns schema `i + FIRST_SCHEMA` into the next one.
const MIGRATIONS: &[Step] = &[ids::legacy];

const TABLE: &str = "meta";
/// Counters and the schema's version.
const META: TableDefinition<&str, u64> = TableDefinition::new(TABLE);

/// Key of the version in [`META`].
const SCHEMA_KEY: &str = "schema";

/// Makes a new or older database one of this schema, in one transaction.
pub(super) fn prepare(db: &Database, path: &Path) -> Result<(), StoreError> {
    migrate(db, path, MIGRATIONS)
}

fn migrate(db: &Database, path: &Path, steps: &[Step]) -> Result<(), StoreError> {
    let known = FIRST_SCHEMA + steps.len() as u64;
    let transaction = db.begin_write()?;
    let found = transaction
        .open_table(META)?
        .get(SCHEMA_KEY)?
        .map(|value| value.value());
    let pending = match found {
        // A new database is made as this version wants it.
        None => &[],
        Some(found) if found > known => {
            return Err(StoreError::NewerSchema {
                path: path.to_owned(),
                found,
                known,
            });
        }
        Some(found) => usize::try_from(found.saturating_sub(FIRST_SCHEMA))
            .ok()
            .and_then(|done| steps.get(done..))
            .unwrap_or_default(),
    };
    for step in pending {
        step(&transaction)?;
    }
    // Readers cannot create tables, so that all of them have to be there.
    snapshots::create_tables(&transaction)?;
    layers::create_tables(&transaction)?;
    images::create_tables(&transaction)?;
    chains::create_tables(&transaction)?;
    indexes::create_tables(&transaction)?;
    traces::create_tables(&transaction)?;
    transaction.open_table(META)?.insert(SCHEMA_KEY, known)?;
    transaction.commit()?;
    Ok(())
}

table!(Counters, META, counter_key, counter_of, |value: u64| value
    .to_le_bytes()
    .to_vec());

fn counter_key(key: &[u8]) -> Option<&str> {
    std::str::from_utf8(key).ok()
}

fn counter_of(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_le_bytes)
}

/// Takes the next number of the counter `key`; the first one is 1.
pub(super) fn next_number(draft: &Draft<'_>, key: &str, what: &'static str) -> Result<u64, StoreError> {
    let last = draft.read::<Counters>(key.as_bytes())?;
    let last = last.and_then(|bytes| counter_of(&bytes)).unwrap_or(0);
    let next = last.checked_add(1).ok_or(StoreError::Exhausted { what })?;
    draft.write::<Counters>(key.as_bytes(), Some(next.to_le_bytes().to_vec()))?;
    Ok(next)
}

#[cfg(test)]
mod tests {
    use redb::ReadableDatabase as _;

    use super::*;

    fn schema_of(db: &Database) -> u64 {
        let transaction = db.begin_read().unwrap();
        let meta = transaction.open_table(META).unwrap();
        meta.get(SCHEMA_KEY).unwrap().unwrap().value()
    }

    #[test]
    fn older_schemas_are_migrated_step_by_step() {
        const NOTES: TableDefinition<&str, u64> = TableDefinition::new("notes");
        let first: Step = |transaction| {
            transaction.open_table(NOTES)?.insert("first", 1)?;
            Ok(())
        };
        let second: Step = |transaction| {
            let mut notes = transaction.open_table(NOTES)?;
            let before = notes.get("first")?.map_or(0, |value| value.value());
            notes.insert("second", before + 1)?;
            Ok(())
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let db = Database::create(&path).unwrap();
        migrate(&db, &path, &[]).unwrap();
        assert_eq!(schema_of(&db), FIRST_SCHEMA);
        migrate(&db, &path, &[first, second]).unwrap();
        assert_eq!(schema_of(&db), FIRST_SCHEMA + 2);
        let transaction = db.begin_read().unwrap();
        let notes = transaction.open_table(NOTES).unwrap();
        assert_eq!(notes.get("second").unwrap().unwrap().value(), 2);
    }

    #[test]
    fn a_failed_step_leaves_the_old_schema() {
        let failing: Step = |_| Err(StoreError::Exhausted { what: "patience" });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let db = Database::create(&path).unwrap();
        migrate(&db, &path, &[]).unwrap();
        assert!(migrate(&db, &path, &[failing]).is_err());
        assert_eq!(schema_of(&db), FIRST_SCHEMA);
    }

    #[test]
    fn a_newer_schema_is_refused_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let db = Database::create(&path).unwrap();
        migrate(&db, &path, &[|_| Ok(())]).unwrap();
        let error = migrate(&db, &path, &[]).unwrap_err();
        assert!(
            matches!(error, StoreError::NewerSchema { found: 2, known: 1, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("install the newer version"), "{error}");
    }
}
