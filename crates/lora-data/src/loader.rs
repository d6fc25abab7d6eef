//! Decoding ahead of training: threads that load the next draws while the last batch is trained.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::{BatchPlan, Dataset, Error, Pixels, PlanItem, Result};

/// How much is loaded ahead.
///
/// | name | default | meaning |
/// |---|---|---|
/// | `threads` | 0 | loader threads, 0 for one per core |
/// | `ahead` | 16 | images kept ready; memory is about this times one decoded picture |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoaderConfig {
    /// Loader threads; 0 means one per core.
    pub threads: usize,
    /// Images that may be ready or being loaded before they are asked for.
    pub ahead: usize,
}

impl Default for LoaderConfig {
    fn default() -> Self {
        Self {
            threads: 0,
            ahead: 16,
        }
    }
}

/// A batch with its pixels, in the order of its items.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadedBatch {
    /// What was planned.
    pub plan: BatchPlan,
    /// One entry per item of the plan.
    pub pixels: Vec<Pixels>,
}

/// Yields planned batches in order, loaded by threads of its own.
///
/// The result does not depend on the number of threads. Dropping the loader stops them.
///
/// ```no_run
/// use std::sync::Arc;
/// use lora_data::{Dataset, DatasetConfig, Loader, LoaderConfig};
///
/// let dataset = Arc::new(Dataset::from_folder("photos", &DatasetConfig::default())?);
/// let plan = dataset.epoch(1, 42);
/// for batch in Loader::new(dataset.clone(), plan.batches, LoaderConfig::default())? {
///     println!("{} images", batch?.pixels.len());
/// }
/// # Ok::<(), lora_data::Error>(())
/// ```
#[derive(Debug)]
pub struct Loader {
    shared: Arc<Shared>,
    batches: std::vec::IntoIter<BatchPlan>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    dataset: Arc<Dataset>,
    items: Vec<PlanItem>,
    /// Items that may be taken beyond those delivered.
    ahead: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Next item for a thread to take.
    next: usize,
    /// Items handed to the caller.
    delivered: usize,
    ready: BTreeMap<usize, Result<Pixels>>,
    stopped: bool,
}

impl Loader {
    /// Starts loading.
    ///
    /// # Errors
    /// [`Error::Io`] when no thread can be started.
    pub fn new(
        dataset: Arc<Dataset>,
        batches: Vec<BatchPlan>,
        config: LoaderConfig,
    ) -> Result<Self> {
        let largest = batches
            .iter()
            .map(|batch| batch.items.len())
            .max()
            .unwrap_or(0);
        let items: Vec<PlanItem> = batches
            .iter()
            .flat_map(|batch| batch.items.iter().copied())
            .collect();
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let count = if config.threads == 0 {
            cores
        } else {
            config.threads
        };
        let shared = Arc::new(Shared {
            dataset,
            items,
            ahead: config.ahead.max(largest).max(1),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let mut loader = Self {
            shared,
            batches: batches.into_iter(),
            threads: Vec::new(),
        };
        for number in 0..count.min(loader.shared.items.len()) {
            let shared = loader.shared.clone();
            let spawned = thread::Builder::new()
                .name(format!("loader {number}"))
                .spawn(move || shared.work());
            match spawned {
                Ok(handle) => loader.threads.push(handle),
                // Fewer threads are slower but enough.
                Err(_) if !loader.threads.is_empty() => break,
                Err(error) => return Err(Error::io("loader thread", error)),
            }
        }
        Ok(loader)
    }
}

impl Iterator for Loader {
    type Item = Result<LoadedBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let plan = self.batches.next()?;
        let pixels = plan
            .items
            .iter()
            .map(|_| self.shared.take_next())
            .collect::<Result<Vec<_>>>();
        Some(pixels.map(|pixels| LoadedBatch { plan, pixels }))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.batches.size_hint()
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread only ends by returning: panics are caught inside.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent after every statement, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some((number, item)) = self.take_work() {
            let loaded = catch_unwind(AssertUnwindSafe(|| self.dataset.pixels(item)));
            let result = loaded.unwrap_or_else(|_| {
                Err(Error::LoaderStopped {
                    what: self.name_of(item),
                })
            });
            self.lock().ready.insert(number, result);
            self.changed.notify_all();
        }
    }

    /// The next item to load, as soon as there is room for it.
    fn take_work(&self) -> Option<(usize, &PlanItem)> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return None;
            }
            let number = state.next;
            let item = self.items.get(number)?;
            if number < state.delivered + self.ahead {
                state.next += 1;
                return Some((number, item));
            }
            state = self.wait(state);
        }
    }

    fn take_next(&self) -> Result<Pixels> {
        let mut state = self.lock();
        loop {
            let number = state.delivered;
            if let Some(result) = state.ready.remove(&number) {
                state.delivered += 1;
                drop(state);
                self.changed.notify_all();
                return result;
            }
            state = self.wait(state);
        }
    }

    fn name_of(&self, item: &PlanItem) -> String {
        self.dataset
            .images()
            .get(item.image)
            .map_or_else(String::new, |image| image.path.display().to_string())
    }
}
