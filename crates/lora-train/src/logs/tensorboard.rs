//! TensorBoard event files, with sd-scripts' tags.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::metadata::unix_time;
use crate::observer::{BatchReport, Event, Observer};
use crate::{Error, Result};

/// Writes one event file that TensorBoard reads: losses, learning rates, norms,
/// validation, sample pictures.
///
/// The format is a sequence of records with checksums (CRC-32C, masked), each holding a
/// protobuf message of five fields; both are small enough to be written by hand.
#[derive(Debug)]
pub struct TensorBoard {
    path: PathBuf,
    file: File,
    broken: bool,
    trouble: Option<String>,
}

impl TensorBoard {
    /// Creates the folder and starts a file in it.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn create(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let path = folder.join(format!(
            "events.out.tfevents.{}.{}",
            unix_time() as u64,
            std::process::id()
        ));
        let file = File::create(&path).map_err(Error::io(&path))?;
        let mut board = Self {
            path,
            file,
            broken: false,
            trouble: None,
        };
        let mut event = Message::default();
        event.double(1, unix_time()).bytes(3, b"brain.Event:2");
        board.record(&event.0);
        Ok(board)
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes one number.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64) {
        let mut item = Message::default();
        item.bytes(1, tag.as_bytes()).float(2, value as f32);
        self.value(step, &item);
    }

    /// Writes one picture, given as a PNG file's bytes.
    pub fn image(&mut self, tag: &str, step: u64, (height, width): (usize, usize), png: &[u8]) {
        let mut picture = Message::default();
        // 3 channels are RGB.
        picture
            .varint(1, height as u64)
            .varint(2, width as u64)
            .varint(3, 3)
            .bytes(4, png);
        let mut item = Message::default();
        item.bytes(1, tag.as_bytes()).bytes(4, &picture.0);
        self.value(step, &item);
    }

    fn value(&mut self, step: u64, item: &Message) {
        let mut summary = Message::default();
        summary.bytes(1, &item.0);
        let mut event = Message::default();
        event
            .double(1, unix_time())
            .varint(2, step)
            .bytes(5, &summary.0);
        self.record(&event.0);
    }

    fn record(&mut self, data: &[u8]) {
        if self.broken {
            return;
        }
        let length = (data.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(data);
        record.extend(masked_crc(data).to_le_bytes());
        if let Err(error) = self
            .file
            .write_all(&record)
            .and_then(|()| self.file.flush())
        {
            let path = self.path.display();
            self.trouble = Some(format!("{path}: {error}; no more is logged"));
            self.broken = true;
        }
    }

    fn batch(&mut self, b: &BatchReport) {
        let step = b.batch;
        self.scalar("loss/current", step, b.loss);
        self.scalar("loss/average", step, b.average_loss);
        for (name, lr, effective) in &b.learning_rates {
            self.scalar(&format!("lr/{name}"), step, *lr);
            if b.adaptive {
                self.scalar(&format!("lr/d*lr/{name}"), step, *effective);
            }
        }
        if let Some(norm) = b.grad_norm {
            self.scalar("norm/grad", step, norm);
        }
        if let Some(norms) = &b.norms {
            self.scalar("max_norm/keys_scaled", step, norms.factors.len() as f64);
            self.scalar("max_norm/max_key_norm", step, norms.max);
            self.scalar("norm/avg_key_norm", step, norms.mean);
        }
        self.scalar("time/batch", step, b.elapsed.as_secs_f64());
        self.scalar("time/waited", step, b.waited.as_secs_f64());
    }
}

impl Observer for TensorBoard {
    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Batch(b) => self.batch(b),
            Event::EpochFinished {
                epoch,
                average_loss,
                ..
            } => self.scalar("loss/epoch_average", *epoch as u64, *average_loss),
            Event::Validated(v) => {
                let step = v.step as u64;
                self.scalar("loss/validation/step_average", step, v.loss);
                self.scalar("loss/validation/step_divergence", step, v.divergence);
                for (t, loss) in &v.by_timestep {
                    self.scalar(&format!("loss/validation/timestep_{t}"), step, *loss);
                }
            }
            Event::Sample {
                index,
                step,
                image,
                png,
                ..
            } => self.image(
                &format!("sample/{index}"),
                *step as u64,
                (image.height, image.width),
                png,
            ),
            _ => {}
        }
    }

    fn trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }
}

/// A protobuf message under construction.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn key(&mut self, field: u8, kind: u8) {
        self.0.push(field << 3 | kind);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u8, value: u64) -> &mut Self {
        self.key(field, 0);
        self.raw_varint(value);
        self
    }

    fn double(&mut self, field: u8, value: f64) -> &mut Self {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn float(&mut self, field: u8, value: f32) -> &mut Self {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(&mut self, field: u8, value: &[u8]) -> &mut Self {
        self.key(field, 2);
        self.raw_varint(value.len() as u64);
        self.0.extend(value);
        self
    }
}

/// CRC-32C (Castagnoli), rotated and shifted as TensorFlow's records want it.
fn masked_crc(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = crc & 1;
            crc >>= 1;
            if carry == 1 {
                crc ^= 0x82F6_3B78;
            }
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_format() {
        // CRC-32C of "123456789" is 0xE3069283 in every description of it.
        let unmasked = masked_crc(b"123456789")
            .wrapping_sub(0xA282_EAD8)
            .rotate_left(15);
        assert_eq!(unmasked, 0xE306_9283);
    }
}
