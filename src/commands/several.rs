//! Images shared out among several devices: batches in turn, each device in a thread of its own, the results in the
//! order of the batches and on the calling thread. No image depends on its batch, so the results are those of one
//! device.
//!
//! Deliberately absent: batches for whoever is free. Devices of one kind take the same time for batches of the same
//! size, and with turns no result waits for more than one batch of another device, so few are held in memory.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::usage;

/// Refuses devices of different kinds.
///
/// # Errors
/// `Error::Usage` with the first two that differ.
pub(super) fn check_alike(devices: &[Device]) -> Result<()> {
    match devices.iter().find(|device| device.kind() != devices[0].kind()) {
        None => Ok(()),
        Some(other) => usage!(
            "--device names {} and {other}, which may round differently, so that an image would depend on which of them computes it: give GPUs of one kind",
            devices[0]
        ),
    }
}

/// Images of a batch out of `count`, one at least, if a device takes up to `most` at once: one device those; several as
/// many as give all of them the same number of batches of the same size, but for what does not divide.
pub(super) fn batch(most: usize, count: usize, devices: usize) -> usize {
    match devices {
        1 => most.min(count),
        _ => count.div_ceil(devices * count.div_ceil(devices * most)),
    }
}

/// Whether the work shall end because some of it has failed.
#[derive(Default)]
pub(super) struct Stop(AtomicBool);

impl Stop {
    /// Work calls it often, and ends with its error.
    ///
    /// # Errors
    /// `Error::Interrupted` if other work has failed.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// Does each of the `jobs` by `work`, of which the first argument is the index of one of the `devices`, and passes the
/// results to `take`, in the order of the jobs. A device is at most two jobs ahead of what is taken.
///
/// # Errors
/// The first error of `work`, with the device's name, or of `take`, which ends all other work at its next
/// [`Stop::check`]. On several devices a panic of `work` is an error, too.
pub(super) fn in_order<J: Sync, T: Send>(
    devices: &[&Device],
    jobs: &[J],
    work: impl Fn(usize, &J, &Stop) -> Result<T> + Sync,
    mut take: impl FnMut(&J, T) -> Result<()>,
) -> Result<()> {
    let stop = Stop::default();
    if devices.len() == 1 {
        return jobs.iter().try_for_each(|job| take(job, work(0, job, &stop)?));
    }
    let failure = Mutex::new(None);
    let fail = |e: Error| {
        // What ends because of the first failure is not the cause.
        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
        stop.0.store(true, Ordering::Relaxed);
    };
    thread::scope(|scope| {
        let (work, fail, stop) = (&work, &fail, &stop);
        let mut results = Vec::with_capacity(devices.len());
        for (k, &device) in devices.iter().enumerate() {
            let (send, receive) = sync_channel(1);
            results.push(receive);
            let own = jobs.iter().skip(k).step_by(devices.len());
            let run = move || {
                for job in own {
                    let result = match catch_unwind(AssertUnwindSafe(|| work(k, job, stop))) {
                        Ok(Ok(result)) => result,
                        Ok(Err(e)) => return fail(named(device, e)),
                        Err(panic) => return fail(Error::Failed(format!("{device} failed: {}", message(&*panic)))),
                    };
                    if send.send(result).is_err() {
                        // Nobody takes it any more.
                        return;
                    }
                }
            };
            if let Err(e) = thread::Builder::new().name(device.to_string()).spawn_scoped(scope, run) {
                fail(Error::Failed(format!("{device}: a thread for it cannot be started: {e}")));
            }
        }
        for (i, job) in jobs.iter().enumerate() {
            // Nobody sends it if work has failed, which has been said then.
            let Ok(result) = results[i % devices.len()].recv() else { return };
            if let Err(e) = take(job, result) {
                return fail(e);
            }
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// An error of a device's work, with its name unless it has it.
fn named(device: &Device, e: Error) -> Error {
    let name = device.to_string();
    let with_name = |what: String| if what.contains(&name) { what } else { format!("{name}: {what}") };
    match e {
        Error::Failed(what) => Error::Failed(with_name(what)),
        Error::NotFinite(what) => Error::NotFinite(with_name(what)),
        other => other,
    }
}

/// What a panic says.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("it does not say why")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::{Duration, Instant};

    use super::*;

    /// Three devices, of which the one in the middle has a name of its own.
    fn devices() -> [Device; 3] {
        [Device::cpu(), Device::meta_gpu(), Device::cpu()]
    }

    /// Waits until `stop` says so.
    fn wait(stop: &Stop) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(60) {
            stop.check()?;
            thread::sleep(Duration::from_millis(1));
        }
        panic!("nobody has stopped it")
    }

    /// The error of ten jobs on three devices.
    fn failure(
        work: impl Fn(usize, &usize, &Stop) -> Result<usize> + Sync,
        take: impl FnMut(&usize, usize) -> Result<()>,
    ) -> Error {
        let jobs: Vec<usize> = (0..10).collect();
        in_order(&devices().each_ref(), &jobs, work, take).expect_err("it fails")
    }

    #[test]
    fn devices_of_different_kinds_are_refused() {
        let [cpu, other, _] = devices();
        check_alike(&[cpu.clone(), Device::cpu()]).unwrap();
        let said = check_alike(&[cpu.clone(), cpu, other]).unwrap_err().to_string();
        assert!(said.contains(" and shapes alone, which may round differently"), "{said}");
    }

    #[test]
    fn batches_are_as_large_as_fits_and_as_many_on_each_device() {
        for (most, count, devices, expected) in [
            (64, 200, 1, 64),
            (64, 7, 1, 7),
            (64, 7, 2, 4),
            (64, 7, 3, 3),
            (64, 1, 3, 1),
            (1000, 10_000, 8, 625),
            (1, 10, 4, 1),
        ] {
            assert_eq!(batch(most, count, devices), expected, "{count} on {devices}");
        }
        for (most, count, devices) in (1..40).flat_map(|m| (1..40).flat_map(move |c| (1..6).map(move |d| (m, c, d)))) {
            let together = batch(most, count, devices);
            let rounds = |batch: usize| count.div_ceil(batch).div_ceil(devices);
            assert!((1..=most).contains(&together) && rounds(together) == rounds(most), "{most}, {count}, {devices}");
        }
    }

    #[test]
    fn results_come_in_order_and_are_few() {
        let three = devices();
        for count in 1..=3 {
            for jobs in [0, 1, 2, 3, 20] {
                let jobs: Vec<usize> = (0..jobs).collect();
                let (begun, mut taken) = (AtomicUsize::new(0), Vec::new());
                let work = |k: usize, &job: &usize, _: &Stop| {
                    assert_eq!(job % count, k, "its turn");
                    begun.fetch_add(1, Ordering::SeqCst);
                    // The first device is the slowest.
                    thread::sleep(Duration::from_millis(2 * (count - k) as u64));
                    Ok(10 * job)
                };
                let take = |&job: &usize, result: usize| {
                    // Each device has one result waiting and the next one in work or in hand.
                    assert!(begun.load(Ordering::SeqCst) <= taken.len() + 2 * count + 1, "results pile up");
                    assert_eq!(result, 10 * job);
                    taken.push(job);
                    Ok(())
                };
                in_order(&three.each_ref()[..count], &jobs, work, take).unwrap();
                assert_eq!(taken, jobs, "{count} devices");
            }
        }
    }

    #[test]
    fn a_failure_ends_all_with_its_sentence() {
        let fails = |how: fn() -> Error| {
            let work = move |k: usize, &job: &usize, stop: &Stop| match (k, job) {
                (1, 4) => Err(how()),
                // The others' first jobs are done, their second ones would never end.
                _ if job < 3 => Ok(job),
                _ => wait(stop).map(|()| job),
            };
            failure(work, |_, _| Ok(())).to_string()
        };
        assert_eq!(fails(|| Error::Failed("out of memory".into())), "shapes alone: out of memory");
        assert_eq!(fails(|| Error::Failed("shapes alone failed".into())), "shapes alone failed");
        assert_eq!(fails(|| Error::NotFinite("a loss is NaN".into())), "shapes alone: a loss is NaN");
        assert_eq!(fails(|| panic!("7 is not 8")), "shapes alone failed: 7 is not 8");
        assert_eq!(fails(|| panic!("{} is not 8", 9)), "shapes alone failed: 9 is not 8");
    }

    #[test]
    fn a_result_that_cannot_be_taken_ends_all() {
        let mut taken = 0;
        let work = |_: usize, &job: &usize, stop: &Stop| if job < 3 { Ok(job) } else { wait(stop).map(|()| job) };
        let take = |_: &usize, job: usize| {
            taken += 1;
            if job == 1 { Err(Error::file("x.part/1.u8", "cannot be written")) } else { Ok(()) }
        };
        assert_eq!(failure(work, take).to_string(), "x.part/1.u8: cannot be written");
        assert_eq!(taken, 2, "nothing is taken after it");
    }
}
